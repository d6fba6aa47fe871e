"""A slot's root and namespaces as a plan of ordered steps."""
