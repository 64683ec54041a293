"""The eight topics' building blocks, written from scratch: no printing, nothing heavy, fully tested.

Topics are imported one by one, so that asking for one never loads the others::

    from dlkernels.learn import basic_classifiers
"""
