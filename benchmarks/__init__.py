"""What is timed, and against what floor: see README.md here."""
