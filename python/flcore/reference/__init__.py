"""The definition of each op in NumPy with float64 sums: what every other variant is tested with."""
