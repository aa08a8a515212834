"""How fast an engine answers: workloads, the loop that drives them, and what is made of the times."""
