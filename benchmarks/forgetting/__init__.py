"""Does LoKI forget less? A study of task score against general ability, on SmolLM2-135M-Instruct.

`tasks` and `retention` make records of token ids, `metrics` scores them, `methods` makes a model
train some of its weights, `pieces` lists and runs the study's parts, `report` reads their results.
"""
