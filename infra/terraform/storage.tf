# The store. Nothing in it expires: pinned versions are read for years, and no job of Braid's deletes an artefact.
resource "google_storage_bucket" "store" {
  name                        = "${var.project}-${var.name}-store"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false

  # A week to take back a deletion that was a mistake.
  soft_delete_policy {
    retention_duration_seconds = 604800
  }
}

# What Dataflow stages, flex templates, and the sources of image builds.
resource "google_storage_bucket" "temp" {
  name                        = "${var.project}-${var.name}-temp"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = true

  # Dataflow's own temporary files would be kept, and paid for, for a week after each job.
  soft_delete_policy {
    retention_duration_seconds = 0
  }

  lifecycle_rule {
    condition {
      age            = 14
      matches_prefix = ["tmp/", "staging/", "source/"]
    }

    action {
      type = "Delete"
    }
  }
}

resource "google_artifact_registry_repository" "images" {
  repository_id = var.name
  location      = var.region
  format        = "DOCKER"
  description   = "Images of Braid's workers and of the flex template's launcher"

  # A tag names one image for good, so that a job resumed in a year runs what it began with.
  docker_config {
    immutable_tags = true
  }

  depends_on = [google_project_service.needed]
}
