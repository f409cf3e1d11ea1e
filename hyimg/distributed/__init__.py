"""Several processes: launching them, what each knows of the others, and sums over them. Nothing is imported here."""
