"""The plan room: what a run will take in memory, time and money, before it is started; and which layout is
best.

In: a recipe, or a model's sizes and a Layout; a cluster. Out: estimates, term by term. Below `entry` and
`here` it is arithmetic on plain values. May import: model, adapt, ops, parallel, data, train; recipe and
track in entry and here.
"""
