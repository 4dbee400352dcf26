# Workers have no external addresses: they reach Google's APIs through the subnet's private access, and nothing else.
resource "google_compute_network" "workers" {
  name                    = var.name
  auto_create_subnetworks = false

  depends_on = [google_project_service.needed]
}

resource "google_compute_subnetwork" "workers" {
  name                     = var.name
  network                  = google_compute_network.workers.id
  region                   = var.region
  ip_cidr_range            = var.subnet_range
  private_ip_google_access = true
}

# Workers shuffle among themselves on these ports; Dataflow gives each of them the tag `dataflow`.
resource "google_compute_firewall" "workers" {
  name        = "${var.name}-dataflow-workers"
  network     = google_compute_network.workers.id
  direction   = "INGRESS"
  source_tags = ["dataflow"]
  target_tags = ["dataflow"]

  allow {
    protocol = "tcp"
    ports    = ["12345-12346"]
  }
}
