"""One round on a GPU box in one command: `kronafuse bench all`.

`parts` says what a round consists of, `run` runs parts within their time, `process` one command.
"""
