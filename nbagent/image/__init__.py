"""Images: archives that become read-only root filesystems in the store. Their content is untrusted."""
