"""Trees of parameters by the names of their leaves."""

import jax


def paths(params, is_leaf=None) -> dict:
    """{`a/b/kernel`: leaf} of a parameter tree; is_leaf: what else is to be taken whole."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def map_paths(function, params, is_leaf=None):
    """The tree with function(path, leaf) in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function("/".join(key.key for key in path), x), params, is_leaf=is_leaf)
