"""Devices: which one can be used and why not (`devices`, `probe`), one graph opened on one (`session`, with
`provider_options`), the meaning of errors (`faults`), and the point where tests inject a device (`backend`).
"""
