"""Devices: which one can be used and why not (`devices`, `probe`), one graph opened on a device (`session`, with
the options of each provider and the point where tests inject a device), the meaning of errors (`faults`).
"""
