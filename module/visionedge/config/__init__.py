"""The configuration: one schema, three carriers (file, environment, twin), every problem at once."""
