"""Small problems behind the rules: NumPy float64 functions on n x n matrices, one concept a file.

Sums over clients run in the order of the rows; nothing here knows about updates.
"""
