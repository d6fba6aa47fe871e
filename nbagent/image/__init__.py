# SPDX-License-Identifier: BSD-3-Clause
"""Images: archives that become read-only root filesystems in the store. Their content is untrusted."""
