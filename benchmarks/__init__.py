"""What locking costs, against what the memory allows and what users could call instead; see README.md."""
