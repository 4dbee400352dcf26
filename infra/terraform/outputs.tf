output "store" {
  description = "For `store.uri` in a spec."
  value       = "gs://${google_storage_bucket.store.name}"
}

output "temp_location" {
  description = "For --temp_location."
  value       = "gs://${google_storage_bucket.temp.name}/tmp"
}

output "images" {
  description = "What an image's name begins with."
  value       = "${google_artifact_registry_repository.images.location}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.name}"
}

output "worker_account" {
  description = "For --service_account_email."
  value       = google_service_account.worker.email
}

output "builder_account" {
  description = "For gcloud builds submit --service-account."
  value       = google_service_account.builder.id
}

output "subnetwork" {
  description = "For --subnetwork."
  value       = "regions/${var.region}/subnetworks/${google_compute_subnetwork.workers.name}"
}
