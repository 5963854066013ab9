"""doctor: what this machine offers, what is used, the first broken link on the way to the GPU, its remedy.

`gather` looks (files, children with time limits), `links` and `surroundings` judge what was seen without
looking themselves, `remedies` knows what to do about it in the words of the place, `report` tells.
"""
