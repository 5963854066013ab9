"""Devices: which one can be used and why not (`devices`, `probe`); one graph opened on a device (`session`,
with each provider's options and the point where tests inject a device); the meaning of errors (`faults`).
"""
