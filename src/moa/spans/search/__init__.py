"""Finding plans: the grid of rules, the integer program, its solvers and the Pareto front."""
