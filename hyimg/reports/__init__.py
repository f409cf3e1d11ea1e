"""Reports about what is on disk: the dataset report and contact sheets. Nothing is imported here."""
