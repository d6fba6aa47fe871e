"""Settings: how one is declared and read (schema), those of a host, and what nginx needs of them."""
