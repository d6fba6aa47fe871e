"""What runs inside an image, under the image's own Python: standard library and Jupyter only."""
