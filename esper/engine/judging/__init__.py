"""How branches are judged: the counterfactual judge, the gates it answers, and the guard against slow harm."""
