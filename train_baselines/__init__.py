"""The stage `baselines`: the other generator families, to be compared with ControlNet on the same data and by the same metrics."""
