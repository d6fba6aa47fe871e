"""A slot's root filesystem and namespaces as a plan of ordered steps."""
