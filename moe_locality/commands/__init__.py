"""What the commands of the command line take and do: one function each, a :class:`Result` out.

A function prints nothing: it returns the JSON object of ``--json`` and how to show it to people.
Its parameters are the options, its docstring is the help.
"""
