"""What `deeplock demo` scores: a small network trained on real handwritten digits, and images it never saw.

`network.py` runs the network in plain NumPy and is all that the demo needs. `train.py` made the two data
files beside it and can make them again.

The images are a part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI
Machine Learning Repository, doi 10.24432/C50P49, licensed CC BY 4.0, in the copy that scikit-learn carries.
"""
