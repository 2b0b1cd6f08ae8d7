"""Analysis of variance of a sweep's results: which choice of the design matters.

`table` reads and filters, `design` says what the factors are and what is missing, `one_way` and `linear` compute,
`plots` and `report` write, `analysis` is the whole.
"""
