"""What a run may add to the core: one feature a file. No file of the core imports any of them."""
