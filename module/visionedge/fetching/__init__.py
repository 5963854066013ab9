"""Models by address: fetched with limits, checked by their sha256, kept in the data folder.

supply      the model of a configuration, wherever it comes from
fetch       try after try on a thread of its own, and what is said meanwhile
attempt     one try over the network, or from a file
faults      what goes wrong on the way, in words
kept        the files in the data folder: parts, whole ones, which go first
address     what an address may be, what a model from there is called
"""
