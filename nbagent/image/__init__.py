"""Images: archives that become read-only root filesystems in the store. Floor 2; an image is hostile data
here."""
