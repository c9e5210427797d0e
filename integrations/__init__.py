"""What each host trainer needs. The core never imports this package; this package imports the core absolutely."""
