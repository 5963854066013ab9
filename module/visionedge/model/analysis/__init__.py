"""Analysis of a graph without running it: shapes, and the operators at its inputs and outputs."""
