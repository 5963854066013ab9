"""Tools that look at the module from outside: the load script."""
