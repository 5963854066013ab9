"""What a graph tells of itself: shapes, the operators at its inputs and outputs."""
