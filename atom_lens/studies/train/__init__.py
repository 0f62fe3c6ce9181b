"""Train: harvest, train atoms, and measure them against nulls."""
