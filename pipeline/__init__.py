"""What each stage computes: plain functions, no Luigi.  `stages` names them all, `__main__` is the command line.

What is asked for: `settings`, `experiment` (the file); resolved on this machine, with the addresses in the store:
`recipes`, `needs`.  The way of a photo: `data`, `encode`, `training` (of `networks`), `sampling`.  The model:
`checkpoints`, `models`, `flow` (its arithmetic outside the network).  Device and dtypes: `device`, `cpu`, `precision`,
`simulation`, `dtypes`.  A stage's process: `children`, `stopping`, `progress`, `records`.  Around it: `planning`,
`study`, `synthetic`.
"""
