"""What AttackModel does on a CPU alone."""
