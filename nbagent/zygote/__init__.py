"""The programs that run inside an image, under its own Python; standard library and Jupyter only."""
