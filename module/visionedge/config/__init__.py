"""The configuration: one schema, three sources (file, environment, twin), every problem at once."""
