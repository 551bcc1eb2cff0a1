"""`mssr plan`: memory and step time of a run, predicted before anything is loaded."""
