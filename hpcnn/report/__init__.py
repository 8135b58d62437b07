"""What is made of runs for people to look at: traces."""
