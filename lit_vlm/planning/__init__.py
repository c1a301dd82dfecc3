"""What a stage costs, before it runs: memory, operations and time of its step, simulated or rehearsed; and measured.

A step of the stage runs through the kit's own module, Lightning's Trainer and PyTorch's allocator, as one process of as
many as are planned, with weights that have no values: on devices that do not exist, or on one that does. What it
executes is counted, and a roofline turns that into time.
"""
