//! nodemesh's testbed: nodes and pods as network namespaces on one kernel, one daemon per node, real programs inside.
