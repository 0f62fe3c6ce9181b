"""What every calculation is built on: rows that need not fit in memory, all pairs tile by tile, several processes."""
