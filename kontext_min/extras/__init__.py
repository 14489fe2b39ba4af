"""Features that the programs add to the core, one per file. No file of the core imports them."""
