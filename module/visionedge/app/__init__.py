"""Composition: builds the module, owns its threads and the configuration in force."""
