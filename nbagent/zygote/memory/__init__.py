"""What makes the forks of a zygote share memory. Standard library only; Python 3.9 and up."""
