"""What every calculation is built on: rows that need not fit in memory, all pairs by the tile, several processes."""
