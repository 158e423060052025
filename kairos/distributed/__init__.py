"""One video on several devices, or a list of videos on all: put on a model from outside.

`launch` starts ranks and ends them together; `parallelize` splits a model over them; `WorkQueue` hands out a list.
"""
